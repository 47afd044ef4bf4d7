"""What torch's operators do: what they write, what they take, how long they last. For all engines for torch."""
