"""Exercise 6: forward and sparse reverse KL.

Nothing of its own: loss_and_gradient of exercise 7 calls your `value`.
"""
