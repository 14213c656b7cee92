"""Files of predictions: tables, JSON, COCO results, YOLO text files."""
