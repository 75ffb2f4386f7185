"""Measurements that print ratios against something run side by side."""
