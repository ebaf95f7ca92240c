"""The command line `kvcompress`: it parses, calls the library and prints. One file for each command."""
