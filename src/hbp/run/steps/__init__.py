"""What is looked after at every step of a run: numbers that are odd, and when the state is saved."""
