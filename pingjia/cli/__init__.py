"""The command line: one file per verb. Wires objects together, decides nothing."""
