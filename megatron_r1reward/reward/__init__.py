"""The reward R = 0.5 F + A (1 + 0.5 C): strict parsing, rules, and a judge of the reasoning's consistency."""
