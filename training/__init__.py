"""Data, corruptions, evaluation, the demo and the command line. Imports `modeling_dms`; nothing there imports this."""
