"""What is around a step: modules, devices, processes, memory. For all engines for torch."""
