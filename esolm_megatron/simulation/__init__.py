"""Ranks of a run of any size, played on one machine without their memory: what they would hold, and what they would send."""
