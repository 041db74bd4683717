"""The publisher: a process beside each learner rank that encodes what the rank wrote, and hands it out."""
