/* Start of a program on QEMU's RISC-V board: stack, .bss, and the counter of instructions. */
#include <stdint.h>

__attribute__((naked, noinline, aligned(16))) static uintptr_t host_call(int operation, const void *block)
{
    (void)operation, (void)block;
    /* The three words mark a semihosting call: uncompressed and in one page. */
    __asm__ volatile(".option push\n\t.option norvc\n\t"
                     "slli zero, zero, 0x1f\n\tebreak\n\tsrai zero, zero, 7\n\tret\n\t.option pop");
}

#include "semihosting.h"

extern uint32_t bss_start[], bss_end[];
int main(void);

/* Compilers of 2022 and later count these instructions as an extension that -march has to name. */
#define CSR(instruction) ".option push\n\t.option arch, +zicsr\n\t" instruction "\n\t.option pop"

uint64_t host_ticks(void)
{
    uint32_t high, low, again;
    do {
        __asm__ volatile(CSR("csrr %0, minstreth\n\tcsrr %1, minstret\n\tcsrr %2, minstreth")
                         : "=r"(high), "=r"(low), "=r"(again));
    } while (high != again);
    return ((uint64_t)high << 32) | low;
}

static __attribute__((used)) void leave(uintptr_t reason)
{
    host_call(SYS_EXIT, (const void *)reason);
    for (;;)
        ;
}

__attribute__((used, aligned(4))) static void trap(void) { leave(0x20024); }

static __attribute__((used)) void start(void)
{
    __asm__ volatile(CSR("csrw mtvec, %0") ::"r"(trap));
#ifdef __riscv_flen
    __asm__ volatile(CSR("csrs mstatus, %0") ::"r"(1 << 13)); /* the floating-point unit is off after reset */
#endif
    for (uint32_t *to = bss_start; to < bss_end;)
        *to++ = 0;
    main();
    leave(0x20026);
}

__attribute__((naked, section(".vectors"), used)) void reset(void)
{
    __asm__ volatile(".option push\n\t.option norelax\n\tla gp, __global_pointer$\n\t.option pop\n\t"
                     "la sp, stack_start\n\tj start");
}
