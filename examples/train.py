"""Train a small ResNet with Zipf's Label Smoothing, and compare it with the usual losses.

    python examples/train.py --preset demo                      # digits: ce, ls and zipf, about two minutes on two cores
"""
