"""Settings of the processor's libraries, to be in the environment before torch is loaded."""

CPU_SETTINGS = {
    "GOMP_SPINCOUNT": "10000",  # threads that wait soon give way, so two programs do not starve
    "THP_MEM_ALLOC_ENABLE": "1",  # torch's large arrays lie on large pages
}
"""They change the time a training takes on a CPU, not what it computes."""
