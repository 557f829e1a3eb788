"""The same order of kinds; within each the last layer goes first."""
start_ln2 = 30
gap_ln2 = -2
start_ln1qk = 42
gap_ln1qk = -2
start_ln1v = 59
gap_ln1v = -3
