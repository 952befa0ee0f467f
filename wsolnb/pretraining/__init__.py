"""How the embedded transformers were made: procedural scenes and the recipes of notebooks 04 and 06."""
