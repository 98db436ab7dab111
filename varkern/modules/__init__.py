"""What the models are made of, with the official parameter names; nothing here generates, loads or saves."""
