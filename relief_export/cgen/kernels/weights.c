/* The tables of {{ name }}.c, from {{ name }}_weights.bin, which must lie where the compiler runs; or say where it is with
   -D{{ upper }}_WEIGHTS='"/path/to/{{ name }}_weights.bin"'. */
#ifndef {{ upper }}_WEIGHTS
#define {{ upper }}_WEIGHTS "{{ name }}_weights.bin"
#endif
#define TEXT_(x) #x
#define TEXT(x) TEXT_(x)
#define SYMBOL TEXT(__USER_LABEL_PREFIX__) "{{ name }}_weights"

#if defined(__APPLE__)
__asm__(".section __TEXT,__const\n");
#elif defined(_WIN32)
__asm__(".section .rdata,\"dr\"\n");
#else
__asm__(".section .rodata\n");
#endif
__asm__(
    ".globl " SYMBOL "\n"
    ".balign 64\n" SYMBOL ":\n"
    ".incbin \"" {{ upper }}_WEIGHTS "\"\n"
    ".balign 64\n"
    ".text\n");
