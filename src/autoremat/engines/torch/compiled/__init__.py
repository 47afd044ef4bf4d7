"""Plans carried out by ``torch.compile``: joint graph to program, plan to joint graph, torch's partitioner."""
