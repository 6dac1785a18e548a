"""`r1reward status`: what a run is doing, how long it still takes, and why it stopped, from its files alone."""
