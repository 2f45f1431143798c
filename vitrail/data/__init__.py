"""Images from where they lie to bytes: archives, layouts, hubs → decoded once, or as they are needed → a `Dataset`."""
