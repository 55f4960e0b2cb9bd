"""The displays of Linux's mediated-device samples: the parents `mbochs` and `mdpy`, and what looks at their pictures."""
