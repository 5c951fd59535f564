"""What is wrong with the hosts of a run: facts of each, measurements between them, and a table, what is wrong first."""
