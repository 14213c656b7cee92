"""Prediction files: tables, JSON, COCO results and YOLO text files."""
