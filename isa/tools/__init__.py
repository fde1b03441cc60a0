"""Tools made from the declarations: assembler, documentation, C header."""
