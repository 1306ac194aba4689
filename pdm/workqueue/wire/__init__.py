"""What crosses a socket or a pipe, as structs that decode and check at once."""
