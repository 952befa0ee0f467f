"""What the notebooks stand on: typed parameters, run folders, batch runs, the command line, figures."""
