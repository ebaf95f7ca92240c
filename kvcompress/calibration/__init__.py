"""Calibration: text -> token windows, and model + windows -> the moments C, m and F of every site."""
