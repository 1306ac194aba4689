"""The engine: claims what is due, has it carried out, and settles what was proven."""
