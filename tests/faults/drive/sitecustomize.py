"""Put on PYTHONPATH by a test, with the folder of `tests`: all processes see $MOUNTED_DRIVE as such a drive."""

import os

import mounted_drive

if "MOUNTED_DRIVE" in os.environ:
    mounted_drive.install(os.environ["MOUNTED_DRIVE"])
