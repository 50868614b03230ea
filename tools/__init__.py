"""Development commands of the Makefile."""
