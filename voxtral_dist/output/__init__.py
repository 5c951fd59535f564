"""What is printed and stored for people: without secrets, and without characters that a terminal would obey."""
