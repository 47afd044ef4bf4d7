"""What torch's operators do, for every torch engine: writes, memory, seconds."""
