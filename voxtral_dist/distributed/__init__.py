"""Ranks as values, and the few collectives that training and evaluation need."""
