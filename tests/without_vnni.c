/* Hides AVX-512, VNNI and AMX from a program, so that it takes the kernels of an AVX2 processor.
 *
 *   gcc -O2 -shared -fPIC without_vnni.c -o without_vnni.so -ldl
 *   LD_PRELOAD=./without_vnni.so python ...
 *
 * Linux lets a process turn the cpuid instruction into a fault, where the processor can (the flag
 * cpuid_fault in /proc/cpuinfo). The handler answers with the real registers, less some bits.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define ARCH_SET_CPUID 0x1012
#define BIT(n) (1u << (n))

static void answer_cpuid(int yes) { syscall(SYS_arch_prctl, ARCH_SET_CPUID, yes); }

static void hide(uint32_t leaf, uint32_t subleaf, uint32_t *a, uint32_t *b, uint32_t *c,
                 uint32_t *d) {
    if (leaf != 7) return;
    if (subleaf == 0) {
        *b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(28) | BIT(30) | BIT(31)); /* AVX-512 F to VL */
        *c &= ~(BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14)); /* VBMI, VNNI, BITALG, VPOPCNTDQ */
        *d &= ~(BIT(8) | BIT(22) | BIT(23) | BIT(24) | BIT(25)); /* VP2INTERSECT, FP16, AMX */
    }
    if (subleaf == 1) {
        *a &= ~(BIT(4) | BIT(5) | BIT(21) | BIT(23)); /* AVX-VNNI, BF16, AMX-FP16, AVX-IFMA */
        *d &= ~(BIT(4) | BIT(5) | BIT(10) | BIT(19)); /* AVX-VNNI-INT8 and -INT16, AVX10 */
    }
}

static void on_fault(int signal_number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *code = (const unsigned char *)registers[REG_RIP];
    if (info->si_code <= 0 || code[0] != 0x0f || code[1] != 0xa2) {
        signal(SIGSEGV, SIG_DFL); /* a real fault happens again, one that was sent is sent again */
        if (info->si_code <= 0) raise(signal_number);
        return;
    }
    uint32_t leaf = registers[REG_RAX], subleaf = registers[REG_RCX], a, b, c, d;
    answer_cpuid(1);
    __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(leaf), "c"(subleaf));
    answer_cpuid(0);
    hide(leaf, subleaf, &a, &b, &c, &d);
    registers[REG_RAX] = a, registers[REG_RBX] = b, registers[REG_RCX] = c, registers[REG_RDX] = d;
    registers[REG_RIP] += 2;
}

/* A program's own handler (pytest has one) must not take ours away. */
int sigaction(int number, const struct sigaction *new, struct sigaction *old) {
    static int (*real)(int, const struct sigaction *, struct sigaction *);
    if (!real) real = dlsym(RTLD_NEXT, "sigaction");
    int ours = new && (new->sa_flags & SA_SIGINFO) && new->sa_sigaction == on_fault;
    return real(number, number == SIGSEGV && !ours ? NULL : new, old);
}

__attribute__((constructor)) static void start(void) {
    struct sigaction action = {0};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, NULL);
    if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) perror("cpuid cannot be hidden here");
}
