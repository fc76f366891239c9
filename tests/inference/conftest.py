"""So that the tests of decoding find helpers of this folder."""
