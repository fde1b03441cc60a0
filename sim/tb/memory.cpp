// The memory of axi_memory.sv under Verilator: the host's file, mapped. Bounds are checked in SV.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "svdpi.h"

static uint8_t *memory;

extern "C" void systole_memory_open(const char *path, long long bytes) {
    const int file = open(path, O_RDWR);
    void *const at =
        file < 0 ? MAP_FAILED : mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (at == MAP_FAILED) {
        perror(path);
        exit(1);
    }
    close(file);
    memory = static_cast<uint8_t *>(at);
}

extern "C" void systole_memory_read(long long address, int bytes, svBitVecVal *word) {
    memcpy(word, memory + address, bytes);
}

extern "C" void systole_memory_write(long long address, int bytes, const svBitVecVal *word,
                                     const svBitVecVal *strobe) {
    const uint8_t *const from = reinterpret_cast<const uint8_t *>(word);
    for (int i = 0; i < bytes; i++)
        if (strobe[i / 32] >> (i % 32) & 1) memory[address + i] = from[i];
}
