"""The packed file: layout, writer, reader, bit packing."""
