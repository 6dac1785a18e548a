"""A Hugging Face model folder, described and examined without torch: sizes, weight tables, files.

What `config.json` says is read once (`shape`), every tensor's name and shape follows from it (`weight_table` and the
families' tables), and `folder_weights` compares that with the files on the disk. `examine` looks at the rest of the
folder. Everything that touches a folder goes through these: conversion, training start, servers, planner, doctor.
"""
