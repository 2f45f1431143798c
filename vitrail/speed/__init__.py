"""Vitrail's speed beside other libraries', and beside what the hardware could do."""
