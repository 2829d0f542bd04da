"""Encoders: frozen or separately trained networks of features of images."""
