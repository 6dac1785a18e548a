"""`r1reward doctor`: what is wrong with this machine, environment or cluster, and how to put it right.

Every check is a function that takes what it looks at as arguments and returns findings; `examine` runs those that
apply where the program runs (own machine, login node, inside a job), on every node of a job.
"""
