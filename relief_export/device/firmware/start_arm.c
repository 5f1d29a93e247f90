/* Start of a program on an emulated Cortex-M: vectors, .data and .bss, the FPU, and SysTick as the counter. */
#include <stdint.h>

static uintptr_t host_call(int operation, const void *block)
{
    register uintptr_t r0 __asm__("r0") = (uintptr_t)operation;
    register const void *r1 __asm__("r1") = block;
    __asm__ volatile("bkpt 0xab" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

#include "semihosting.h"

extern uint32_t data_load[], data_start[], data_end[], bss_start[], bss_end[], stack_start[];
int main(void);

#define SYSTICK ((volatile uint32_t *)0xE000E010) /* control, reload, current; counts 24 bits down */
#define CPACR (*(volatile uint32_t *)0xE000ED88)

static volatile uint32_t wraps;

static void systick(void) { wraps++; }

uint64_t host_ticks(void)
{
    uint32_t high, low;
    do { /* again where the counter wrapped between the two readings */
        high = wraps;
        low = SYSTICK[2];
    } while (high != wraps);
    return ((uint64_t)high << 24) + (0xFFFFFF - low);
}

static void fault(void)
{
    host_call(SYS_EXIT, (const void *)0x20024); /* a run-time error: the emulator leaves with 1 */
    for (;;)
        ;
}

static __attribute__((noinline, used)) void start(void)
{
    for (uint32_t *from = data_load, *to = data_start; to < data_end;)
        *to++ = *from++;
    for (uint32_t *to = bss_start; to < bss_end;)
        *to++ = 0;
    SYSTICK[1] = 0xFFFFFF;
    SYSTICK[2] = 0;
    SYSTICK[0] = 7; /* the processor's clock, an interrupt at each wrap */
    main();
    host_call(SYS_EXIT, (const void *)0x20026); /* the application ends, 0 */
    for (;;)
        ;
}

static void reset(void)
{
#ifdef __ARM_FP
    CPACR |= 0xFu << 20; /* before any function that may save a floating-point register */
    __asm__ volatile("dsb\n\tisb" ::: "memory");
#endif
    start();
}

__attribute__((section(".vectors"), used)) const void *const vectors[16] = {
    stack_start, (void *)reset, (void *)fault, (void *)fault, (void *)fault, (void *)fault, (void *)fault,
    [15] = (void *)systick,
};
