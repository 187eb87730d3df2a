"""headkv inside other libraries. Each file needs its library when it is imported, and no sooner."""
