"""How the embedded transformers were made: procedural scenes and the recipes of notebook 04."""
