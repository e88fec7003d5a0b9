"""Training stacks themselves: `make test-stacks` installs them, and `make test` leaves this folder out."""
