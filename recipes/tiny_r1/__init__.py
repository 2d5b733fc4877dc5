"""How the bundled tiny reasoning model is made; README.md tells how to run it."""
