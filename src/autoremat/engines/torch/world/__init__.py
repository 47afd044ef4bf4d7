"""What surrounds a step, for every torch engine: modules, devices, processes, memory."""
