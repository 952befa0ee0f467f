"""The localization methods, one module each."""
