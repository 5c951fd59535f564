"""Ranks as values, their devices, and the few collectives that training and evaluation need."""
