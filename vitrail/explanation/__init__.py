"""What a model looks at, in numbers."""
