"""Tells ``twistd`` that there is a ``pdmworkqueue``."""

from twisted.application.service import ServiceMaker

pdmworkqueue = ServiceMaker(
    "PDM Workqueue", "pdm.workqueue.daemon", "Lists, copies and removes files at storage sites.", "pdmworkqueue"
)
