"""GLUE and Long-Range Arena: their data, their metrics, their heads."""
