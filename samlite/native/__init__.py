"""The compiled module, one file for each minor version of torch: which one fits, and how one is built."""
